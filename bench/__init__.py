"""Benches: measured claims, each by one command, with committed results.

python -m bench NAME [--quick] [--json FILE] [--fresh] [--redo RIVAL]
python -m bench claims [--json]
python -m bench readme
python -m bench list
"""
