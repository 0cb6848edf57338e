"""A small app that sells credits: workshops of ten steps, the first six free, the rest behind one credit.

``app.py`` is the app with Tallystick in it, ``__main__.py`` starts it on an embedded PostgreSQL and the Stripe double.
"""
