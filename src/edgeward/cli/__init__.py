"""The program `edgeward`: commands by module, `main.py` has the table of them."""
