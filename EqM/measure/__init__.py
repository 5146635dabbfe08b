"""Measuring tools, beside the product: `python -m EqM.measure.benchmark`. Nothing else imports them."""
