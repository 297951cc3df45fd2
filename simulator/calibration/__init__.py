"""Measured kernels and serving runs → parameters, each with its standard error and its errors on data left out."""
