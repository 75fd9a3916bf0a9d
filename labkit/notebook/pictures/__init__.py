"""A drawn picture of each notebook's idea, from real runs of the engine wherever it has something to show."""

from labkit.notebook.pictures.batches import padded_and_flat, seats
from labkit.notebook.pictures.budget import step_budget
from labkit.notebook.pictures.capacity import three_walls
from labkit.notebook.pictures.drafts import draft_and_verify, noise
from labkit.notebook.pictures.grid import int8_grid
from labkit.notebook.pictures.halves import column_then_row
from labkit.notebook.pictures.loops import open_and_closed
from labkit.notebook.pictures.mask import mask_over_tokens
from labkit.notebook.pictures.moves import what_moves
from labkit.notebook.pictures.prefix import prefix_tree
from labkit.notebook.pictures.roof import Point, roofline, roofline_of_a_t4
from labkit.notebook.pictures.svg import Drawing
from labkit.notebook.pictures.table import block_table
from labkit.notebook.pictures.tiles import attention_tiles
from labkit.notebook.pictures.turn import one_turn

__all__ = [
    "Drawing",
    "Point",
    "attention_tiles",
    "block_table",
    "column_then_row",
    "draft_and_verify",
    "int8_grid",
    "mask_over_tokens",
    "noise",
    "one_turn",
    "open_and_closed",
    "padded_and_flat",
    "prefix_tree",
    "roofline",
    "roofline_of_a_t4",
    "seats",
    "step_budget",
    "three_walls",
    "what_moves",
]
