"""The intermediate representation: types, ops, plans, their text and their cost."""
