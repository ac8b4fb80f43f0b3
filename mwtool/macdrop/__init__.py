"""MacDrop: dropout on the frozen massive rows while a PEFT adapter is trained (paper, Algorithm 1).

Imports only from architecture, and from what these may import.
"""
