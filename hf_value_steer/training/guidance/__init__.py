"""How a guidance module is trained, from a labelled collection."""
