"""The residual block around attention: norms, products, dropout and additions."""
