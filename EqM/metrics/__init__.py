"""Is it any good: features, figures and what they are figures against."""
