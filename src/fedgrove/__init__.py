"""Several owners of private text make one large language model smaller and better together."""
