"""The plotly figures, a file each. They draw what `labkit.views.facts` holds, and import plotly right away.

Equal traces give equal JSON, in plotly 5.24 and later. Only the throughput figure and the token timeline show
seconds. The others are made of steps and tokens, so a notebook can compare them exactly.
"""
