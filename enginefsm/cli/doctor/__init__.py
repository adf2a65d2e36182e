"""`enginefsm doctor`: what it sees, what that means, and what to do. It starts nothing and changes nothing.

`looking` collects the facts within bounds, `facts` holds them, `checks` judges them without any I/O, and `showing`
makes a table, plain text or JSON of the findings.
"""
