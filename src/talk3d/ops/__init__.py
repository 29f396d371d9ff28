"""Pure functions on tensors: geometry, rays, samples, planes, resampling. No modules, no files, no state."""
