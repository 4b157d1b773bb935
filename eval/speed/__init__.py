"""What measures speed: shapes with random weights, contenders that take turns, reports."""
