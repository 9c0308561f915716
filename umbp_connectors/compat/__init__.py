"""The names of others over our pool, so that what was written for them runs with another import."""
