"""Room: measured kernels and serving runs → parameters with residual error; predictions beside measurements."""
