"""A page in which a browser runs packages: `python -m rmse_edge.web_demo`."""
