"""Runs -> one page."""
