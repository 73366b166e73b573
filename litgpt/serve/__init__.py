"""`litgpt serve`: a model and its adapters behind an HTTP interface.

command.py    the settings, and the life of the process
models.py     one backbone and what requests may ask for by name
scheduler.py  the thread that computes: requests join and leave the running batch
schemas.py    requests as OpenAI's and LitGPT's clients send them
app.py        the addresses and the answers' formats
page.html     the page to chat at /
"""
