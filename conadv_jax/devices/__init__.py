"""The mesh, what devices exchange, compiler flags: all that names shardings."""
