"""A model behind OpenAI's HTTP interface: requests.py -> engine.py (one thread, sessions.py) -> answers.py; app.py has the routes."""
