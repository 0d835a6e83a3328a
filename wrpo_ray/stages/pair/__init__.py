"""From scored answers to preference rows: y_ws, y_wt and y_l."""
