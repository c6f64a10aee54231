"""`sam-jax demo`: a page in the browser on which one tries a model on one's own pictures.

`visit.py` says what the page shows, in pure functions; `page.py` is the page, in gradio; the
picture with what is on it, and the mouse over it, are `stage.html`, `stage.css` and `stage.js`.
"""
