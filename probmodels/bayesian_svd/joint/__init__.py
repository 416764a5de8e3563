"""Several fields, members or lags in one decomposition, and what couples two fields."""
