"""The only places that open files: media, clips, weights."""
