"""Room: training and serving in one optimum. Joins loss laws, training cost, and what a query takes."""
