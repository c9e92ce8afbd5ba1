"""How a person or a program talks to a model: a terminal, a web page with an inspector, limits of a server."""
