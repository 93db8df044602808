"""Dense layers into sparse ones: where units stand, how routers are fitted, and what is solved for again."""
