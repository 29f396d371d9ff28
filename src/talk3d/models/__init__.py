"""The networks: generator, renderer, super-resolution, conditioning, deltaplane predictor. They know configs and tensors, no files."""
