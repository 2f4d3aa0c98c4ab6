"""The project's claims, as commands that reproduce them."""
