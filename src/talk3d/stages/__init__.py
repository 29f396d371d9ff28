"""The stages: one public function each, from one noun to the next."""
