"""The checks that every method goes through, for methods of your own too.

``check_method(MyMethod())`` runs them all; in pytest, ``checks_for(case)`` yields them one by one.
"""

from pliant.testing.case import Case
from pliant.testing.checks import check_method, checks, checks_for
from pliant.testing.toys import TOYS, Toy

__all__ = ["TOYS", "Case", "Toy", "check_method", "checks", "checks_for"]
