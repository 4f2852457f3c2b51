"""Contracts and the ground every other room stands on; imports nothing from them."""

from base.rooms import check_rooms

check_rooms()
