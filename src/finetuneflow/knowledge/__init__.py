"""What is known before a run: facts, estimates, recommendations, findings. Values in, values out.

Nothing here reads a file (its own packaged tables apart), a clock or a network, and nothing imports torch:
`planning.py`, one floor up, gathers what these functions are asked about.
"""
