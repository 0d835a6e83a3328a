"""From scored candidates to y_ws, y_wt and y_l."""
