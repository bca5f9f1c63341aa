"""Plans to look at: tables of layers, graphs, and the report, a page that needs nothing but a browser."""
