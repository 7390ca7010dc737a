"""The paper's tables, made again: experiments as data, their runs, and what is gathered from them."""
