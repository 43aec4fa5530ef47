"""The shipped world: a fictional marketing-copy company, its catalogue, its 50 customers, their tasks and the scorers.

Everything here is invented for the course and rebuilt bit for bit by `labs data build`.
"""
