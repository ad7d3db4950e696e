"""Low-level kernels: block-wise 8-bit states, stochastic rounding, fused steps, choice of matrix library.

Nothing here knows what an optimizer is. Every native call has a twin in plain torch operations that gives the same codes:
`if not native.encode_into(...): blockwise.encode_into(...)`.
"""
