"""`sam-jax demo`: a page in the browser on which you try a model on your own images.

`visit.py` says what the page shows, in pure functions; `app.py` has the page's routes and their
limits, `server.py` serves them. `page.html`, `page.css` and `page.js` are the page; the image with
what is on it, the mouse over it and its keys are `stage.js` and `stage.css`.
"""
