"""`sam-jax demo`: a page in the browser on which one tries a model on one's own pictures.

`visit.py` says what the page shows, in pure functions; `page.py` is the page, in gradio; the
picture with what is on it, the mouse over it and the keys, are `stage.html`, `stage.css` and
`stage.js`. `server.py` serves the page; `guard.py` and `upload.py` stand before what gradio does.
"""
