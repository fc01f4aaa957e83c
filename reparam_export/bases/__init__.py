"""Where a base comes from: one scheme, one file; ``build(argument, base)`` makes the module and its signature.

The docstring of each file is the documentation of its spec. Third parties add schemes through entry points of the
group ``reparam_export.bases``.
"""
