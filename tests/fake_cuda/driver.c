// What libtorch asks CUDA's driver (libcuda.so.1) for itself, for the stand-in for CUDA.

// Whether the device is in use: always.
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  (void)device;
  *flags = 0;
  *active = 1;
  return 0;
}
