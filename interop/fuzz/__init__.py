"""Coverage-guided fuzzing: ``python -m interop.fuzz TARGET --seconds N``, see docs/testing.md.

``targets.py`` has one function for each target; ``seeds.py`` makes their first inputs. The small
corpus in the tree is replayed by the tests without any fuzzer.
"""
