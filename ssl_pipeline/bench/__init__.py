"""The measurements that README quotes, one command each."""
