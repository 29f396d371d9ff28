"""talk3d: a short video of one person talking in, a talking 3D avatar out."""
