"""`litgpt serve`: a model and its adapters behind an HTTP interface.

command.py    the settings, and the life of the process
models.py     one backbone and the models that requests may name
scheduler.py  the thread that computes: requests join and leave the running batch
schemas.py    requests as OpenAI's and LitGPT's clients send them
app.py        the endpoints and the formats of responses
page.html     the page to chat at /
"""
