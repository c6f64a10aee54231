"""`sam-jax demo`: a web page to try a model on your own images.

`session.py` computes what the page shows, in pure functions; `app.py` has the page's routes and
their limits, and `server.py` serves them. `page.html`, `page.css` and `page.js` are the page;
`stage.js` and `stage.css` draw the image with its marks and handle its mouse and key events.
"""
