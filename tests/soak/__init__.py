"""Endurance tests: thousands of kills and resumes (`python -m tests.soak`), and a fuzzer for files
that are read (`python -m tests.soak.fuzz`).
"""
