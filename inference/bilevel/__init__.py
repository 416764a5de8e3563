"""The bilevel engine `fit_bilevel`, its rounds and its hypergradients."""
