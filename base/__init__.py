"""Contracts and the ground every other room stands on; imports nothing from them."""
