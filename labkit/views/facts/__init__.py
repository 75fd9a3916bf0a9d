"""What a trace shows, worked out once as plain objects.

Figures, text twins and exports all state these facts, so that they cannot disagree. No plotly here.
"""
