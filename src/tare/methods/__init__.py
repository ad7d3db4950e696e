"""Methods: one file per paper. The registry is `tare.methods.registry`."""
